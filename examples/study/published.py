"""The figures the study is compared with, one run each.

"Fixed AdaCosのすすめ：固定スケールで使おう！" (Try Fixed AdaCos: use it with a fixed scale!), 27
September 2023, https://zenn.dev/ykesamaru/articles/c2fdaf08fdee9c; code and complete tables:
https://github.com/yKesamaru/adacos (revision 2b3a242).
"""

# Accuracy in %, (training, test), by loss. Margin losses by 1-NN, cross-entropy by arg max. Of
# AdaCos whose scale follows the batches it only says that the accuracy hardly rises.
MNIST = {
    "arcface": (99.90, 97.36),
    "simple_arcface": (98.72, 95.78),
    "fixed_adacos": (99.95, 98.09),
    "adacos": (None, None),
    "cross_entropy": (98.32, 98.17),
}
FACES = {
    "arcface": (98.61, 85.22),
    "fixed_adacos": (99.42, 90.02),
    "adacos": (None, None),
    "cross_entropy": (94.57, 89.44),
}
