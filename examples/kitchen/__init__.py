"""A rendered egocentric kitchen: a world whose true state, boxes, hands and words are known.

It makes training pairs of the manifest's form: a frame before an action, the action's label and description, and the
frame in which hands carry it out. Everything is drawn from code and a seed; the only files are two rigged hand meshes
(`assets/`, MIT, licence beside them). The library never imports this package: it ships what was trained on it.

Read in this order: `scene` (one pair from a seed), `actions` (what can happen), `room` and `things` (where and with
what), `hand` (by whom), `geom` (triangle meshes), `raytrace` (pixels); `render` and `sheet` are the commands.

Units are metres and degrees. x points right, y away from the cook, z up; the counter's top is at z = 0.9, its front
edge at y = 0 and the wall behind it at y = 0.62.
"""
