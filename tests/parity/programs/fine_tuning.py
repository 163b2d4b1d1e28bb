"""A loader for fine-tuning: a step of training, and the weights saved for the next."""

from demucs.pretrained import get_model
from torch.nn import functional as F

model = get_model("htdemucs", repo=REPO).models[0]
model.requires_grad_(True)
model.train()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
generator = torch.Generator().manual_seed(1)
length = int(model.segment * model.samplerate)
sources = torch.randn(2, len(model.sources), model.audio_channels, length, generator=generator)
losses = []
for _ in range(2):
    loss = F.l1_loss(model(sources.sum(1)), sources)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
torch.save(model.state_dict(), OUT / "tuned.pt")
fresh = get_model("htdemucs", repo=REPO).models[0]
fresh.load_state_dict(torch.load(OUT / "tuned.pt"))
with torch.no_grad():
    tuned = fresh.eval()(sources.sum(1))
norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
result = {"losses": torch.tensor(losses), "tuned": tuned, "norm": norm / 1000}
facts = model.training, fresh.training, list(model.state_dict())
