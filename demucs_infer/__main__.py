"""Run the command `demucs-infer` as `python -m demucs_infer`."""

import sys

from demucs_infer.cli.main import main

sys.exit(main())
