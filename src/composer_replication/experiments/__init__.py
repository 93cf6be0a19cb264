"""What the verbs run: smoke, train, doctor."""
