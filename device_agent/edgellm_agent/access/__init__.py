"""Who may do what: callers, roles, the rule of each method, and the record of what was done."""
