// Package hostprovider is the hypervisor's side of one host: inventory,
// prerequisite checks, the replication relationship, and cutting and settling
// points.
//
// It owns: which machines the host holds, whether they can be protected, and
// the host's record in the "hosts" bucket. It never reads disk data and knows
// nothing of the target.
//
// A [Driver] stands for one kind of hypervisor. Driver imagedir (a folder of
// images, served to guests by the change-tracker) is the reference; its points
// live in the change-tracker, beside the disks, and are relayed here.
//
// Events in: none. Events out: none; facts travel in the host record.
package hostprovider
