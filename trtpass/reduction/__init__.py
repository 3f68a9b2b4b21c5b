"""Token reduction: from chosen layers on, a stream carries fewer tokens (docs/reduction.md).

Every method is three choices, after FiCoCo (arXiv 2411.17686): a *filter* says which tokens go, a *correlation* says
which of the others each of them joins, a *compression* says how it joins. ToMe, EViT and FiCoCo-V are named choices;
``reduce:filter=evit,correlate=ficoco-v,compress=mean`` mixes them.
"""
