"""Rules: `rule(current, updates, memory, *, ...) -> (state, memory)`. One file and one yaml each; see conf/rule/."""
