"""Per-patient clipped gradients, by closed form and by Opacus. torch and opacus are loaded by no other package."""
