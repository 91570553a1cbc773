"""Did the attacks work? What is computed about a finished run, to tell a robust model from a failed attack."""
