package blobstore

import "strings"

// Action is a set of things that an identity may do with blobs. The names are those of Azure's data actions
// (Microsoft.Storage/storageAccounts/blobServices/containers/blobs/…), which every store's rights are measured by.
type Action uint8

// The actions.
const (
	// Read: get, stat, list, page ranges, snapshots ("blobs/read").
	Read Action = 1 << iota
	// Create: put a blob under a name that is not taken ("blobs/add/action").
	Create
	// Write: overwrite, write and clear pages, set the number, snapshot, and all lease calls ("blobs/write"). It includes Create.
	Write
	// Delete: delete blobs and snapshots ("blobs/delete").
	Delete
	// MakeContainers: create containers ("containers/write").
	MakeContainers
	// ListContainers: list containers ("containers/read").
	ListContainers
)

// String lists the actions as an operator reads them.
func (a Action) String() string {
	var names []string
	for i, name := range []string{"read", "create", "write", "delete", "make containers", "list containers"} {
		if a&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	return strings.Join(names, "+")
}

// Grant lets an identity do something.
type Grant struct {
	// Containers is the prefix of the containers it holds for, for example "lfj-"; empty is all of them.
	Containers string
	// Blobs is the prefix of the blobs it holds for, for example "log/"; empty is all of them. In Azure it is a condition of
	// the role assignment on the blob's path.
	Blobs string
	// Actions that are allowed.
	Actions Action
}

// Grants are all that an identity may do.
type Grants []Grant

// Allow reports whether one of the actions may be done to a blob. An empty name stands for the container as a whole: only a grant
// for all of its blobs counts.
func (g Grants) Allow(any Action, container, blob string) bool {
	for _, one := range g {
		if one.Actions&any != 0 && strings.HasPrefix(container, one.Containers) && strings.HasPrefix(blob, one.Blobs) {
			return true
		}
	}
	return false
}
