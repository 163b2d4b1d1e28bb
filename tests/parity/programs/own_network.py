"""A network of one's own in upstream's machinery: apply_model, a bag and a package on the disk."""

from demucs.apply import BagOfModels, apply_model
from demucs.htdemucs import HTDemucs
from demucs.states import capture_init, get_state, load_model
from torch import nn


class Louder(nn.Module):
    @capture_init
    def __init__(self, gain=2.0):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.sources = ["soft", "loud"]
        self.samplerate = RATE
        self.audio_channels = 2
        self.segment = 0.75

    def forward(self, mix):
        return torch.stack([mix / self.gain, mix * self.gain], 1)


loud = Louder(4.0)
args, kwargs = loud._init_args_kwargs
state = get_state(loud, None)
package = {"klass": Louder, "args": args, "kwargs": kwargs, "state": state, "training_args": {}}
loaded = load_model(package)
bag = BagOfModels([loaded, Louder()], weights=[[1, 0.5], [1, 1.5]])
torch.manual_seed(0)
network = HTDemucs(**ARGUMENTS).eval()
result = {
    "single": apply_model(loaded, WAV[None], shifts=0, overlap=0.25),
    "bag": apply_model(bag, WAV[None], shifts=0, split=False),
}
facts = (
    loaded.gain.detach().item(),
    args,
    kwargs,
    bag.sources,
    bag.weights,
    [name for name, _ in network.named_parameters()],
)
