"""The one door through which Flower enters the consortium."""
