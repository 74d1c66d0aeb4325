"""Simulated robots behind one interface: our MuJoCo tasks, robosuite and Gymnasium."""
