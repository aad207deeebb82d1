"""Who lives where: budgets, ledger, cost model, solver and plan."""
