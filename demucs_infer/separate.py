"""The command line under upstream's module name: `separate.main(["song.mp3"])`."""

from demucs_infer.cli.main import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
