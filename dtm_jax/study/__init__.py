"""Many runs as one: arms of pre-training side by side, what their students are worth, and how sure that is."""
