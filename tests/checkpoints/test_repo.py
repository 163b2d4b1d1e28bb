"""Folders, bags and the hub: each name leads to the right file or to one clear error."""

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
from tests.helpers.networks import TINY, randomise


def save(path: Path, seed: int = 0) -> nn.Module:
    """A checkpoint at `path`, and the network that is in it."""
    network = randomise(Demucs(**TINY["Demucs"]), seed)
    kwargs, state = TINY["Demucs"], network.state_dict()
    torch.save({"klass": Demucs, "args": (), "kwargs": kwargs, "state": state}, path)
    return network


def with_checksum(path: Path) -> Path:
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    return path.rename(path.with_name(f"{path.stem}-{digest}{path.suffix}"))


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values())
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(tmp_path / "first.th", 1)
    save(tmp_path / "second.th", 2)
    with_checksum(tmp_path / "second.th")
    (tmp_path / "both.yaml").write_text(
        "models: ['first', 'second']\nweights: [[1., 0., 0., 1.], [0., 1., 1., 0.]]\nsegment: 1\n"
    )
    (tmp_path / "notes.txt").write_text("not a model")
    return tmp_path


def any_repo(folder: Path) -> AnyModelRepo:
    single = LocalRepo(folder)
    return AnyModelRepo(single, BagOnlyRepo(folder, single))


def test_a_folder_lists_its_models(folder: Path) -> None:
    repo = any_repo(folder)
    assert set(repo.list_model()) == {"first", "second", "both"}
    assert all(repo.has_model(name) for name in ("first", "second", "both"))
    assert not repo.has_model("notes")


def test_listing_a_bag_does_not_make_it_a_network(folder: Path) -> None:
    repo = any_repo(folder)
    repo.list_model()
    assert not repo.model_repo.has_model("both")


def test_a_bag_has_its_networks_weights_and_segment(folder: Path) -> None:
    bag = any_repo(folder).get_model("both")
    assert isinstance(bag, BagOfModels)
    assert len(bag.models) == 2
    assert [list(row) for row in bag.weights] == [[1, 0, 0, 1], [0, 1, 1, 0]]
    assert all(float(model.segment) == 1 for model in bag.models)
    assert same(bag.models[0], randomise(Demucs(**TINY["Demucs"]), 1))
    assert not any(model.training for model in bag.models)


def test_a_network_twice_in_a_bag_is_built_once(folder: Path) -> None:
    (folder / "twice.yaml").write_text("models: [first, first]")
    bag = any_repo(folder).get_model("twice")
    assert isinstance(bag, BagOfModels)
    assert bag.models[0] is bag.models[1]


def test_one_flipped_bit_is_found(folder: Path) -> None:
    (file,) = folder.glob("second-*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged"):
        any_repo(folder).get_model("second")


@pytest.mark.parametrize("name", ["first-12345678.th", "first.safetensors"])
def test_two_files_for_one_signature_are_refused(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(ModelLoadingError, match="two files for 'first'"):
        LocalRepo(folder)


def test_an_unknown_name_gets_a_suggestion(folder: Path) -> None:
    with pytest.raises(ModelNotFound, match="Did you mean 'second'"):
        any_repo(folder).get_model("secnd")


def test_no_folder_is_an_error_and_no_exit(tmp_path: Path) -> None:
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
def test_a_bag_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "bad.yaml").write_text(text)
    with pytest.raises(CheckpointError, match="bad"):
        any_repo(folder).get_model("bad")


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


def test_a_bag_of_networks_that_differ_is_refused(folder: Path) -> None:
    other = {**TINY["Demucs"], "sources": ["one", "two"]}
    network = Demucs(**other)
    torch.save({"klass": Demucs, "kwargs": other, "state": network.state_dict()}, folder / "o.th")
    (folder / "odd.yaml").write_text("models: [first, o]")
    with pytest.raises(CheckpointError, match="do not match"):
        any_repo(folder).get_model("odd")


def test_a_bag_names_networks_and_no_paths(folder: Path) -> None:
    (folder / "out.yaml").write_text("models: ['../first']")
    with pytest.raises(ModelNotFound):
        any_repo(folder).get_model("out")


# ── the hub ──


@pytest.fixture
def hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, str, dict[str, bytes]], None]:
    """Files that were fetched before, so that no network is needed to look at them."""

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
def test_the_hubs_names(tmp_path: Path, name: str, repository: str) -> None:
    assert HubRepo(name, CheckpointStore(tmp_path)).repository == repository


def test_a_model_of_the_hub(tmp_path: Path, hub: Callable[..., None]) -> None:
    from safetensors.torch import save

    network = randomise(Demucs(**TINY["Demucs"]), 7)
    metadata = {
        "klass": "demucs.demucs.Demucs",
        "args": "[]",
        "kwargs": json.dumps(TINY["Demucs"]),
    }
    weights = save(network.state_dict(), metadata)
    hub("me", "Demucs-x", {"x.yaml": b"models: [abc]", "abc.safetensors": weights})
    repo = HubRepo("hf://me/x", CheckpointStore(tmp_path, offline=True))
    assert repo.bag().models == ("abc",)
    assert same(repo.get_model("abc"), network)
    assert list(repo.list_model().values()) == [
        "https://huggingface.co/me/Demucs-x/resolve/main/abc.safetensors"
    ]


@pytest.mark.parametrize("name", ["hf://", "hf://a/../b", "hf://a/b/c", "hf://../x", "hf://a b"])
def test_names_that_are_paths_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadingError, match="hf://namespace/name"):
        HubRepo(name, CheckpointStore(tmp_path))


@pytest.mark.parametrize("member", ["../../x", "/etc/x", "a/b", ".hidden", "x" * 200])
def test_files_outside_the_repository_are_refused(
    tmp_path: Path, hub: Callable[..., None], member: str
) -> None:
    hub("me", "Demucs-x", {"x.yaml": json.dumps({"models": [member]}).encode()})
    with pytest.raises(ModelLoadingError, match="invalid file name"):
        HubRepo("hf://me/x", CheckpointStore(tmp_path, offline=True)).fetch()


def test_the_catalogue_by_signature(tmp_path: Path) -> None:
    repo = RemoteRepo(CheckpointStore(tmp_path, offline=True))
    assert repo.has_model("955717e8")
    assert str(repo.list_model()["955717e8"]).endswith("hybrid_transformer/955717e8-8726e21a.th")
    with pytest.raises(ModelNotFound, match="Did you mean '955717e8'"):
        repo.get_model("955717e9")


def test_a_bag_is_a_value(folder: Path) -> None:
    assert read_bag(folder / "both.yaml").segment == 1
