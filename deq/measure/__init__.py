"""What is measured beside training: speedup, crossover, energy, floating-point operations."""
