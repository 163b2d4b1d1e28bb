"""A network that is built, saved, and loaded by name again."""

from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from demucs.pretrained import get_model
from demucs.states import copy_state, get_state, save_with_checksum, set_state, swap_state

reference = get_model("aaaa0000", repo=REPO)
network = HTDemucs(**ARGUMENTS)
set_state(network, get_state(reference, None))
args, kwargs = network._init_args_kwargs
state = copy_state(get_state(network, None))
package = {"klass": HTDemucs, "args": args, "kwargs": kwargs, "state": state}
save_with_checksum({**package, "training_args": {}}, OUT / "mine.th")
silent = {name: torch.zeros_like(weight) for name, weight in state.items()}
network.eval()
with swap_state(network, silent):
    nothing = apply_model(network, WAV[None], shifts=0)
mine = get_model("mine", repo=OUT)
result = {
    "nothing": nothing,
    "network": apply_model(network, WAV[None], shifts=0),
    "mine": apply_model(mine, WAV[None], shifts=0),
}
