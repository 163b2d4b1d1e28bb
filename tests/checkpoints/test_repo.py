"""Test folders, bags and the Hub: each name leads to the right file or a clear error."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from demucs_infer.apply import BagOfModels
from demucs_infer.checkpoints.cache import CheckpointStore
from demucs_infer.demucs import Demucs
from demucs_infer.errors import CheckpointError, ModelLoadingError, ModelNotFound
from demucs_infer.repo import AnyModelRepo, BagOnlyRepo, HubRepo, LocalRepo, RemoteRepo, read_bag
from tests.helpers.networks import TINY, randomize


def save_checkpoint(path: Path, seed: int = 0) -> nn.Module:
    """Write a checkpoint, and return its network."""
    network = randomize(Demucs(**TINY["Demucs"]), seed)
    kwargs, state = TINY["Demucs"], network.state_dict()
    torch.save({"klass": Demucs, "args": (), "kwargs": kwargs, "state": state}, path)
    return network


def add_checksum_to_name(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"{path.stem}-{digest}{path.suffix}"))


def have_equal_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values())
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_checkpoint(tmp_path / "first.th", 1)
    save_checkpoint(tmp_path / "second.th", 2)
    add_checksum_to_name(tmp_path / "second.th")
    (tmp_path / "both.yaml").write_text(
        "models: ['first', 'second']\nweights: [[1., 0., 0., 1.], [0., 1., 1., 0.]]\nsegment: 1\n"
    )
    (tmp_path / "notes.txt").write_text("not a model")
    return tmp_path


def open_repo(folder: Path) -> AnyModelRepo:
    single = LocalRepo(folder)
    return AnyModelRepo(single, BagOnlyRepo(folder, single))


def test_folder_lists_its_networks_and_bags(folder: Path) -> None:
    repo = open_repo(folder)
    assert set(repo.list_model()) == {"first", "second", "both"}
    assert all(repo.has_model(name) for name in ("first", "second", "both"))
    assert not repo.has_model("notes")


def test_bag_is_not_a_single_network(folder: Path) -> None:
    repo = open_repo(folder)
    repo.list_model()
    assert not repo.model_repo.has_model("both")


def test_bag_is_built_with_its_weights_and_segment(folder: Path) -> None:
    bag = open_repo(folder).get_model("both")
    assert isinstance(bag, BagOfModels)
    assert len(bag.models) == 2
    assert [list(row) for row in bag.weights] == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert all(float(model.segment) == 1 for model in bag.models)
    assert have_equal_weights(bag.models[0], randomize(Demucs(**TINY["Demucs"]), 1))
    assert not any(model.training for model in bag.models)


def test_network_that_occurs_twice_is_built_once(folder: Path) -> None:
    (folder / "twice.yaml").write_text("models: [first, first]")
    bag = open_repo(folder).get_model("twice")
    assert isinstance(bag, BagOfModels)
    assert bag.models[0] is bag.models[1]


def test_flipped_bit_is_detected_by_checksum(folder: Path) -> None:
    (file,) = folder.glob("second-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        open_repo(folder).get_model("second")


@pytest.mark.parametrize("name", ["first-12345678.th", "first.safetensors"])
def test_two_files_of_the_same_signature_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(ModelLoadingError, match="two files for 'first'"):
        LocalRepo(folder)


def test_similar_name_is_suggested(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="Did you mean 'second'"):
        open_repo(folder).get_model("secnd")


def test_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadingError, match="nope"):
        LocalRepo(tmp_path / "nope")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "models: first",
        "models: []",
        "models: [1]",
        "models: [first]\nweights: [[1], [2]]",
        "models: [first]\nweights: 3",
        "models: [first]\nweights: [[a]]",
        "models: [first]\nsegment: -1",
        "models: [first]\nsegment: .nan",
        "models: [first]\nsegment: yes",
        "models: [first]\nweights: [[1., 2.]]",
        "models: [a, b]\nmodels: [",
        "a: &a [1,1]\nmodels: !!python/object/apply:os.system ['true']",
        "[" * 5000,
        "models: [first] # " + "x" * 2**20,
    ],
)
def test_invalid_bag_is_refused(folder: Path, text: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="bad"):
        open_repo(folder).get_model("bad")


def nested_aliases(levels: int) -> str:
    """Return a bag whose segment would be a list of 10 ** levels numbers."""
    lines = ["models: [first]", "a0: &a0 [1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"segment: *a{levels - 1}"])


def merged_aliases(levels: int) -> str:
    lines = ["models: [first]", "a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        pytest.param("models: [" + "a," * 300_000 + "a]", "too large", id="300,000 names"),
        pytest.param("models:\n" + "- a\n" * 300_000, "too large", id="300,000 lines"),
        pytest.param("models: [" + "a," * 30_000 + "a]", "too many values", id="30,000 names"),
        pytest.param("- " * 5000 + "a", "nested", id="nested in blocks"),
        pytest.param("[" * 30_000, "nested", id="nested in brackets"),
        pytest.param("{a: " * 5000, "nested", id="nested in braces"),
        pytest.param("? " * 5000 + "a", "nested", id="nested in keys"),
        pytest.param(nested_aliases(10), "alias", id="nested aliases"),
        pytest.param(merged_aliases(9), "alias", id="merged aliases"),
        pytest.param("&a [*a]", "alias", id="alias of itself"),
        pytest.param("models: [first]\nweights: [[1" + "0" * 400 + "]]", "", id="no float"),
        pytest.param("models: [first]\nsegment: 1" + "0" * 5000, "", id="long number"),
        pytest.param("a: 1\n" * 10_000, "too many values", id="duplicate keys"),
        pytest.param("#" * 60_000, "", id="comment"),
        pytest.param("a" * 60_000, "", id="long text"),
    ],
)
def test_oversized_bag_is_refused_within_a_second(folder: Path, text: str, reason: str) -> None:
    (folder / "bad.yaml").write_text(text)
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=rf"bad\.yaml is not .*{reason}") as caught:
        read_bag(folder / "bad.yaml")
    assert time.perf_counter() - start < 1
    assert len(str(caught.value)) < 1000


def test_bag_of_networks_with_different_stems_is_refused(folder: Path) -> None:
    other = {**TINY["Demucs"], "sources": ["one", "two"]}
    network = Demucs(**other)
    torch.save({"klass": Demucs, "kwargs": other, "state": network.state_dict()}, folder / "o.th")
    (folder / "odd.yaml").write_text("models: [first, o]")
    with pytest.raises(CheckpointError, match="do not match"):
        open_repo(folder).get_model("odd")


def test_paths_as_members_of_a_bag_are_refused(folder: Path) -> None:
    (folder / "out.yaml").write_text("models: ['../first']")
    with pytest.raises(ModelNotFound):
        open_repo(folder).get_model("out")


# ── the hub ──


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, dict[str, bytes]], None]:
    """Return a function that puts files into the cache, so that none is downloaded."""

    def put(namespace: str, repository: str, files: dict[str, bytes]) -> None:
        place = tmp_path / "hub" / namespace / repository
        place.mkdir(parents=True)
        for name, content in files.items():
            (place / name).write_bytes(content)

    return put


@pytest.mark.parametrize(
    ("name", "repository"),
    [
        ("hf://htdemucs", "adefossez/HTDemucs"),
        ("hf://htdemucs_ft", "adefossez/HTDemucs-ft"),
        ("hf://someone/htdemucs_my_own", "someone/HTDemucs-my_own"),
        ("hf://mdx_extra_q", "adefossez/Demucs-mdx_extra_q"),
    ],
)
def test_repository_name_on_the_hub(tmp_path: Path, name: str, repository: str) -> None:
    assert HubRepo(name, CheckpointStore(tmp_path)).repository == repository


def test_model_of_the_hub_is_loaded_from_the_cache(
    tmp_path: Path, hub: Callable[..., None]
) -> None:
    from safetensors.torch import save

    network = randomize(Demucs(**TINY["Demucs"]), 7)
    metadata = {
        "klass": "demucs.demucs.Demucs",
        "args": "[]",
        "kwargs": json.dumps(TINY["Demucs"]),
    }
    weights = save(network.state_dict(), metadata)
    hub("me", "Demucs-x", {"x.yaml": b"models: [abc]", "abc.safetensors": weights})
    repo = HubRepo("hf://me/x", CheckpointStore(tmp_path, offline=True))
    assert repo.bag().models == ("abc",)
    assert have_equal_weights(repo.get_model("abc"), network)
    assert list(repo.list_model().values()) == [
        "https://huggingface.co/me/Demucs-x/resolve/main/abc.safetensors"
    ]


@pytest.mark.parametrize("name", ["hf://", "hf://a/../b", "hf://a/b/c", "hf://../x", "hf://a b"])
def test_invalid_hub_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadingError, match="hf://namespace/name"):
        HubRepo(name, CheckpointStore(tmp_path))


@pytest.mark.parametrize("member", ["../../x", "/etc/x", "a/b", ".hidden", "x" * 200])
def test_hub_members_outside_the_repository_are_refused(
    tmp_path: Path, hub: Callable[..., None], member: str
) -> None:
    hub("me", "Demucs-x", {"x.yaml": json.dumps({"models": [member]}).encode()})
    with pytest.raises(ModelLoadingError, match="invalid file name"):
        HubRepo("hf://me/x", CheckpointStore(tmp_path, offline=True)).fetch()


def test_catalog_is_searched_by_signature(tmp_path: Path) -> None:
    repo = RemoteRepo(store=CheckpointStore(tmp_path, offline=True))
    assert repo.has_model("955717e8")
    assert str(repo.list_model()["955717e8"]).endswith("hybrid_transformer/955717e8-8726e21a.th")
    with pytest.raises(ModelNotFound, match="Did you mean '955717e8'"):
        repo.get_model("955717e9")


def test_bag_is_read_without_building_it(folder: Path) -> None:
    assert read_bag(folder / "both.yaml").segment == 1


def test_error_of_a_damaged_bag_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "bag.yaml"
    path.write_text("models: [a\nsegment: {")
    with pytest.raises(CheckpointError, match="is not a valid bag") as error:
        read_bag(path)
    assert "\n" not in str(error.value)


def test_error_of_a_long_name_is_short(folder: Path) -> None:
    (folder / "long.yaml").write_text(f"models: [{'x' * 20_000}]")
    with pytest.raises(ModelNotFound) as error:
        open_repo(folder).get_model("long")
    assert len(str(error.value)) < 1000
