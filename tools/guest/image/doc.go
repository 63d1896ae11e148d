// Package image builds the two disks of the lab guest.
//
// It needs neither root nor a loop device nor a mount: the kernel and the
// guest agent come out of Debian packages (packages.go), the initial RAM file
// system is written here (initramfs.go), ext4 is made and filled by mke2fs -d,
// the EFI partition by mtools, the loaders by grub-mkimage, and the partition
// table, the boot sector and the whole image by this package (disk.go).
//
// One OS image boots in each way a machine of Hyper-V or Azure may boot:
//
//	p1  BIOS boot   core.img of GRUB, started by the boot sector   -> BIOS, generation 1
//	p2  EFI         /EFI/BOOT/BOOTX64.EFI                          -> UEFI
//	p3  ext4        label landfall-os: kernel, RAM disk, programs
//
// The data disk is one ext4 without partitions, label landfall-data.
//
// Packages are kept in a cache folder by their names and versions. When apt's
// lists are there they say which versions are wanted; otherwise the set that
// was used last is used again. A warm cache needs no network.
package image
