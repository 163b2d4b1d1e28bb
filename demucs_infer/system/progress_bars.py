"""Choose between progress bars in text and, in a notebook, as widgets."""

import sys
from importlib.util import find_spec
from typing import Any


def choose_bar_class(module: Any) -> Any:
    """Return the class of the progress bar to show: `module.tqdm`, or the widget of a notebook.

    `module` is tqdm, or what a program has put into its place to observe progress. `tqdm.auto`
    would warn where widgets are not installed, and would ignore a replaced class.
    """
    import tqdm.std

    if module.tqdm is tqdm.std.tqdm and _has_widgets():
        from tqdm.notebook import tqdm as notebook_bar

        return notebook_bar
    return module.tqdm


def _has_widgets() -> bool:
    """Return whether this is the kernel of a notebook, with ipywidgets installed."""
    ipython = sys.modules.get("IPython")
    is_kernel = ipython is not None and hasattr(ipython.get_ipython(), "kernel")
    return is_kernel and find_spec("ipywidgets") is not None
