"""Plain torch backends in any precision: slow, and the truth for the tests."""
