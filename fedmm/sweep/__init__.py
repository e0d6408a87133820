"""Many runs: what there is to run, running it, and the page of what came out."""
