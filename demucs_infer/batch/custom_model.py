"""Specify a custom model for a batch: its configuration, its weights and its class."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demucs_infer.batch.request import ModelSpec
from demucs_infer.custom.community import PREFIX, choose_rules
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.errors import ModelLoadingError
from demucs_infer.options import Request
from demucs_infer.system.checksum import sha256_file

if TYPE_CHECKING:
    from demucs_infer.api import Separator


@dataclass(frozen=True, kw_only=True)
class CustomModelSpec(ModelSpec):
    """A custom model: a configuration, a checkpoint and, optionally, the class of the network."""

    config: Config = field(hash=False)  # it has dictionaries
    checkpoint: Path
    module: str | None = None
    class_name: str | None = None
    """Name of the class in `module`; by default the configuration's `model_type` selects it."""

    def __post_init__(self) -> None:
        if not self.checkpoint.is_file():
            raise ModelLoadingError(f"checkpoint not found: {self.checkpoint}")
        if (self.module is None) != (self.class_name is None):
            raise ValueError("--module and --class go together")

    @cached_property
    def metadata(self) -> ModelMetadata[Any] | None:
        """The class of the network; None if `model_type` selects it."""
        if self.module is None or self.class_name is None:
            return None
        try:
            return ModelMetadata.from_module(
                self.module, self.class_name, model_type=self.config.model_type
            )
        except AttributeError as error:
            raise ValueError(str(error)) from error

    def fill_settings(self, settings: Mapping[str, object]) -> dict[str, object]:
        """Return the settings of a request, and for the others those of the configuration."""
        filled: dict[str, Any] = {**self.config.settings, **settings}
        if settings.get("two_stems") is not None:  # it excludes stems, which the file may choose
            filled["stems"] = settings.get("stems")
        if self.config.model_type.startswith(PREFIX) and "derive" not in settings:
            filled["derive"] = choose_rules(
                self.config.rules, self.config.model.output_stem_names, filled["stems"]
            )
        return filled

    def weights(self) -> tuple[str, ...]:
        """Return digests of the configuration, the code of `module`, and the checkpoint."""
        description = [self.config.to_dict(), self.module, self.class_name, self._code_digest()]
        text = json.dumps(description, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest(), sha256_file(self.checkpoint)

    def _code_digest(self) -> str | None:
        """Return the sha256 of the file of `module`; None if there is no such file."""
        try:
            spec = find_spec(self.module) if self.module else None
        except (ImportError, ValueError):  # reported when the module is imported
            return None
        path = Path(spec.origin) if spec and spec.has_location and spec.origin else None
        return sha256_file(path) if path and path.is_file() else None

    def open(self, request: Request) -> Separator:
        """Return a separator for the network, with the settings of a request."""
        from demucs_infer.api import Separator  # imports torch, which finished tracks do not need

        return Separator.from_pretrained(
            config=self.config,
            checkpoint=self.checkpoint,
            metadata=self.metadata,
            options=request.separation,
            stem_options=request.stems,
        )
