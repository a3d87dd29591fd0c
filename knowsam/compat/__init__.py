"""The published KnowSAM code's behaviours and checkpoints. Nothing but build, config and command line knows of them."""
