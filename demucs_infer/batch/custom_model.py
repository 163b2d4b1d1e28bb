"""A network of one's own on the command line: a configuration, weights, and where its class is."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from demucs_infer.batch.request import ModelSpec
from demucs_infer.custom.config import Config
from demucs_infer.custom.metadata import ModelMetadata
from demucs_infer.errors import ModelLoadingError
from demucs_infer.options import Request, StemOptions
from demucs_infer.system.checksum import sha256_file

if TYPE_CHECKING:
    from demucs_infer.api import Separator


@dataclass(frozen=True, kw_only=True)
class CustomModelSpec(ModelSpec):
    """What `--config`, `--checkpoint`, `--set`, `--module` and `--class` say."""

    config: Config
    checkpoint: Path
    module: str | None = None
    class_name: str | None = None
    """With `module`; otherwise the configuration's `model_type` says which network it is."""

    def __post_init__(self) -> None:
        if not self.checkpoint.is_file():
            raise ModelLoadingError(f"there is no checkpoint {self.checkpoint}")
        if (self.module is None) != (self.class_name is None):
            raise ValueError("--module and --class go together")

    @cached_property
    def metadata(self) -> ModelMetadata[Any] | None:
        """The class that the words name; None where they name none."""
        if self.module is None or self.class_name is None:
            return None
        try:
            return ModelMetadata.from_module(
                self.module, self.class_name, model_type=self.config.model_type
            )
        except AttributeError as error:
            raise ValueError(str(error)) from error

    def weights(self) -> tuple[str, ...]:
        """Digests of what decides the answers of the network, apart from what its code imports."""
        told = [self.config.to_dict(), self.module, self.class_name, self._code()]
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest(), sha256_file(self.checkpoint)

    def _code(self) -> str | None:
        """The digest of the file of `module`; None where there is no such file."""
        try:
            found = find_spec(self.module) if self.module else None
        except (ImportError, ValueError):  # it will be said when the module is needed
            return None
        path = Path(found.origin) if found and found.has_location and found.origin else None
        return sha256_file(path) if path and path.is_file() else None

    def open(self, request: Request) -> Separator:
        """Return the network, ready for a request, with all of its own stems."""
        from demucs_infer.api import Separator  # brings torch, which what is done does not need

        return Separator.from_pretrained(
            config=self.config,
            checkpoint=self.checkpoint,
            metadata=self.metadata,
            options=request.separation,
            stem_options=StemOptions(),
        )
