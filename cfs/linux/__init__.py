"""System calls that Python lacks; knows nothing of composefs."""
