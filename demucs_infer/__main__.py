"""`python -m demucs_infer` is the command `demucs-infer`."""

import sys

from demucs_infer.separate import main

sys.exit(main())
