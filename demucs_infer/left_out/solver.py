"""Refuse to be imported: this module of upstream is for training."""

from demucs_infer import refuse_import

refuse_import(__name__)
