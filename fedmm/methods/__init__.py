"""Methods: `method(model, batch, step, *, ...)` yields losses; the loop backpropagates each. See conf/method/."""
