"""A menu of all models, made of what is private upstream."""

from demucs.pretrained import REMOTE_ROOT, _parse_remote_files
from demucs.repo import AnyModelRepo, BagOnlyRepo, RemoteRepo

models = _parse_remote_files(REMOTE_ROOT / "files.txt")
repo = RemoteRepo(models)
bags = BagOnlyRepo(REMOTE_ROOT, repo)
both = AnyModelRepo(repo, bags)
facts = (
    models,
    sorted(bags.list_model()),
    sorted(both.list_model()),
    both.has_model("htdemucs_ft"),
    repo.has_model("nosuch"),
    sorted(path.name for path in REMOTE_ROOT.glob("*.yaml")),
)
