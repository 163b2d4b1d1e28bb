"""`python -m demucs_infer` is the command `demucs-infer`."""

import sys

from demucs_infer.cli.main import main

sys.exit(main())
