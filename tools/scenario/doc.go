// Package scenario holds tests of the whole product in one process: the six
// services as `landfall up` composes them, driven through the command line and
// NBD as people and guests do. It has no code of its own.
package scenario
