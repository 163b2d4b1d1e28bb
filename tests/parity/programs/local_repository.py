"""Models of a folder, by the classes of the repository."""

from demucs.apply import apply_model
from demucs.repo import AnyModelRepo, BagOnlyRepo, LocalRepo, ModelLoadingError, ModelOnlyRepo

models = LocalRepo(REPO)
repo = AnyModelRepo(models, BagOnlyRepo(REPO, models))
errors = []
for name in ("nosuch", "aaaa0000x"):
    try:
        repo.get_model(name)
    except RuntimeError as error:
        errors.append(isinstance(error, ModelLoadingError))
bag = repo.get_model("bag")
result = {"member": apply_model(bag.models[0].eval(), WAV[None], shifts=0)}
facts = errors, isinstance(models, ModelOnlyRepo), sorted(repo.list_model())
