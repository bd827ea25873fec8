"""The hospital: compute sees DNA and no keys, the gate sees keys and no DNA."""
