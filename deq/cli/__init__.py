"""Hydra's manners: one page of help, values checked before any work, mistakes told in one sentence, sweeps."""
