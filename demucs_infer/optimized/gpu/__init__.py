"""Run networks on a GPU: half-precision products, fused steps, captured graphs."""
