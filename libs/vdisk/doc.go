// Package vdisk opens and makes the disk images that Landfall protects and recovers: raw files with holes, and fixed
// VHD, which is a raw file with a 512-byte footer behind it (docs/formats/vhd.md).
//
// An Image reads and writes the virtual disk only; the footer is out of reach. Extents tells which ranges hold data,
// so that absent space is never read, and Zero gives space back where the file system can.
//
// An image opened for writing is locked: a second owner, in this or another process, gets ErrLocked. Reading takes no
// lock.
package vdisk
