"""Models of the environment: the contract, and the ensemble of the paper."""
