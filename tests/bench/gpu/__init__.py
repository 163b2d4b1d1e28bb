"""Check, measure and profile the networks on a GPU: `python -m tests.bench.gpu`."""
