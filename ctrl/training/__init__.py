"""How a run is made. Mathematics is beside this folder, what is learned in `ctrl.algorithms`; `ctrl.fit` is the way in.

settings    how a run is made                       processes   what processes send one another
collect     trajectories with their rewards         replay      those in store, and minibatches of their nodes
epoch       what an algorithm may ask for           engine      an update becomes an optimiser step
metrics     what is counted and measured            precision   float32 for what rounding would drown
guards      what a run watches in itself            interrupts  how it ends early, and can go on
checkpoint  what it needs to go on                  state, files  of what parts, in what folders
loop        fit                                     device, lock
"""
