"""Reasoning tasks and their verifiers, benchmarks, planted errors, and the sampler that answers them."""
