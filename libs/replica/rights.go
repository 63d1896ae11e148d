package replica

import "github.com/landfall-dr/landfall/libs/blobstore"

// Role is who works on a lineage in storage. Each has an identity of its own with no more than these rights, so that a stolen host
// cannot harm history, and nobody but retention deletes from the journal.
type Role string

// The roles.
const (
	// RoleShip ships points and passes from a site: uploader:ship and resync-engine:compare.
	RoleShip Role = "ship"
	// RoleApply turns the journal into replica disks: uploader:apply.
	RoleApply Role = "apply"
	// RoleRetain gives points up: uploader:retain.
	RoleRetain Role = "retain"
	// RoleSchedule makes lineages, ends them and holds points: the scheduler.
	RoleSchedule Role = "schedule"
	// RoleFailover closes, rewinds and opens lineages, and copies points: the failover-orchestrator.
	RoleFailover Role = "failover"
	// RoleRecover reads everything: `landfall recover --from-storage`.
	RoleRecover Role = "recover"
	// RoleTakeOver is RoleRecover with --take-over.
	RoleTakeOver Role = "take-over"
)

// Roles returns all roles.
func Roles() []Role {
	return []Role{RoleShip, RoleApply, RoleRetain, RoleSchedule, RoleFailover, RoleRecover, RoleTakeOver}
}

// Containers of lineages, by prefix, and the one of an account.
const (
	journalPrefix  = "lfj-"
	stagingPrefix  = "lfs-"
	replicaPrefix  = "lfr-"
	failoverPrefix = "lff-"
	// CatalogueContainer has what is known of sites, machines, policies and plans (package catalogue).
	CatalogueContainer = "lf-catalogue"
)

// Rights returns the least that a role needs. A role that is not known may do nothing.
func Rights(role Role) blobstore.Grants {
	const (
		read     = blobstore.Read
		create   = blobstore.Create
		write    = blobstore.Write | blobstore.Create
		remove   = blobstore.Delete
		makeList = blobstore.MakeContainers | blobstore.ListContainers
	)
	everything := blobstore.Grants{{Containers: "lf", Actions: read | blobstore.ListContainers}}
	switch role {
	case RoleShip:
		return blobstore.Grants{
			{Containers: journalPrefix, Actions: read | create},
			{Containers: stagingPrefix, Actions: read | create},
			{Containers: replicaPrefix, Actions: read}, // the retention record, after each put (rule 8)
		}
	case RoleApply:
		return blobstore.Grants{
			{Containers: journalPrefix, Actions: read},
			{Containers: stagingPrefix, Actions: read},
			{Containers: replicaPrefix, Actions: read | write},
			{Containers: replicaPrefix, Blobs: diskPrefix, Actions: remove}, // snapshots that no checkpoint names (rule 23)
		}
	case RoleRetain:
		return blobstore.Grants{
			{Containers: journalPrefix, Actions: read | remove},
			{Containers: stagingPrefix, Actions: read | remove},
			{Containers: replicaPrefix, Actions: read | remove},
			{Containers: replicaPrefix, Blobs: retentionName, Actions: write},
			{Containers: replicaPrefix, Blobs: ckptPrefix, Actions: create}, // void checkpoints (rule 23)
			{Containers: replicaPrefix, Blobs: "idx/", Actions: create},     // extent maps of what is given up
		}
	case RoleSchedule:
		return blobstore.Grants{
			{Containers: "lf", Actions: makeList},
			{Containers: journalPrefix, Actions: read},
			{Containers: journalPrefix, Blobs: logPrefix, Actions: create}, // the close that ends a protection
			{Containers: stagingPrefix, Actions: read},
			{Containers: replicaPrefix, Actions: read},
			{Containers: replicaPrefix, Blobs: retentionName, Actions: write}, // holds
			{Containers: CatalogueContainer, Actions: read | write | remove},
		}
	case RoleFailover:
		return blobstore.Grants{
			{Containers: journalPrefix, Actions: read | create},
			{Containers: stagingPrefix, Actions: read},
			{Containers: replicaPrefix, Actions: read},
			{Containers: replicaPrefix, Blobs: retentionName, Actions: write}, // pins
			{Containers: failoverPrefix, Actions: read | write | remove},
			{Containers: CatalogueContainer, Actions: read},
			{Containers: CatalogueContainer, Blobs: "plans/", Actions: write | remove},
		}
	case RoleRecover:
		return everything
	case RoleTakeOver:
		return append(everything, blobstore.Grant{Containers: journalPrefix, Actions: create})
	}
	return nil
}
