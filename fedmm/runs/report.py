def write(run):
    return run
