"""How good are samples? Two figures a human can read."""

import numpy as np


def svm_accuracy(x, held, folds=5):
    """Five-fold accuracy of an RBF SVM that tells x from held-out data: .5 is perfect.

    x, held: (n, ...) arrays of equal n. Returns (mean, standard error over the folds).
    """
    from sklearn.model_selection import StratifiedKFold, cross_val_score
    from sklearn.svm import SVC
    points = np.concatenate((x, held)).reshape(len(x) + len(held), -1)
    accuracy = cross_val_score(SVC(), points, np.arange(len(points)) < len(x),
                               cv=StratifiedKFold(folds, shuffle=True, random_state=0))
    return accuracy.mean(), accuracy.std(ddof=1) / folds**.5


def nearest_distance(x, train):
    """Median over x of the distance to the nearest training sample: far below held-out data's
    own is memorising."""
    from sklearn.neighbors import NearestNeighbors
    nearest = NearestNeighbors(n_neighbors=1).fit(train.reshape(len(train), -1))
    return float(np.median(nearest.kneighbors(x.reshape(len(x), -1))[0]))
