// Package qemu drives QEMU machines over QMP: points by dirty bitmaps and a frozen copy, passes by dirty bitmaps alone.
// design.md in this folder has its record, its invariants and what happens when a step is interrupted.
package qemu
