"""`python -m tests.snapshot`: write down what is public now."""

import os
import tempfile
from pathlib import Path

from tests.snapshot import DATA, commands, helps, openapi, roads, signatures, write_json, write_text


def main() -> None:
    """Write every data file; those of the digests keep what other machines have found."""
    for module in signatures.MODULES:
        write_json(signatures.file_of(module), signatures.collect_signatures(module))
    for name, text in helps.collect_helps().items():
        write_text(f"help/{name}.txt", text)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DEMUCS_INFER_CACHE"] = folder  # nothing here is the user's
        write_json("openapi.json", openapi.collect_openapi(Path(folder)))
        write_json("exit_codes.json", commands.collect_exit_codes(Path(folder) / "codes"))
        write_json("stems_json.json", commands.collect_manifest(Path(folder) / "manifest"))
        found = {count: roads.measure(Path(folder), count) for count in roads.THREADS}
    roads.write_down(found)
    print(f"written: {DATA}")


if __name__ == "__main__":
    main()
