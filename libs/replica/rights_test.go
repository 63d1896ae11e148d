package replica

import (
	"bytes"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/blobstoretest"
)

// as opens the lineage of the rig with the rights of a role and nothing more.
func (g *rig) as(role Role) *Replica {
	g.t.Helper()
	r, err := Open(g.t.Context(), blobstoretest.Restrict(g.store, Rights(role)), testLineage)
	require.NoError(g.t, err)
	return r
}

// TestEachRoleWorksWithItsOwnRights runs what each role does with the rights of Rights and no others.
func TestEachRoleWorksWithItsOwnRights(t *testing.T) {
	t.Run("schedule makes a lineage and ends it", func(t *testing.T) {
		store := blobstoretest.NewMemory()
		r, err := Create(t.Context(), blobstoretest.Restrict(store, Rights(RoleSchedule)), testLineage)
		require.NoError(t, err)
		_, err = r.Points(t.Context())
		require.NoError(t, err)
		_, err = r.CloseLineage(t.Context(), FenceOptions{Failover: "end"})
		require.NoError(t, err)
	})
	t.Run("ship commits a pass and a point", func(t *testing.T) {
		g := newRig(t)
		shipper := g.as(RoleShip)
		g.r = shipper
		g.commit(g.partial(1, 1, 1, 0, 1, 0, two(content{0: 1}, content{0: 2})))
		config, err := shipper.PutConfig(t.Context(), []byte(`{"v":1}`))
		require.NoError(t, err)
		p := g.point(KindBase, 2, 1, 1, 0, two(content{1: 3}, nil))
		p.Config = config
		require.Equal(t, Committed, g.commit(p).Outcome)
		require.Equal(t, AlreadyCommitted, g.commit(p).Outcome)
	})
	t.Run("apply brings the disks up and makes checkpoints", func(t *testing.T) {
		g := begun(t)
		r := g.as(RoleApply)
		_, err := g.applier(r).Advance(t.Context(), 4)
		require.NoError(t, err)
		_, err = r.Checkpoint(t.Context(), 4)
		require.NoError(t, err)
		_, err = r.VoidCheckpoint(t.Context(), 2)
		require.NoError(t, err)
		g.wantDisks(at3)
	})
	t.Run("failover closes, rewinds, reads and opens", func(t *testing.T) {
		g := begun(t)
		r := g.as(RoleFailover)
		_, err := r.CloseLineage(t.Context(), FenceOptions{Failover: "f"})
		require.NoError(t, err)
		g.rewind(r, "f", 2)
		g.wantPoint(r, 2, at2)
		_, err = r.ReopenLineage(t.Context(), ReopenOptions{FenceOptions: FenceOptions{Failover: "f"}})
		require.NoError(t, err)
		copies := r.Store().Container(testLineage.FailoverContainer())
		_, err = copies.Put(t.Context(), "f/steps.json", bytes.NewReader(nil), 0, blobstore.Conditions{})
		require.NoError(t, err)
	})
	t.Run("recover reads", func(t *testing.T) {
		g := begun(t)
		g.wantPoint(g.as(RoleRecover), 3, at3)
		r := g.as(RoleRecover)
		for name, err := range r.Store().ListContainers(t.Context(), journalPrefix) {
			require.NoError(t, err)
			require.Equal(t, testLineage.JournalContainer(), name)
		}
	})
	t.Run("take-over closes and reads", func(t *testing.T) {
		g := begun(t)
		r := g.as(RoleTakeOver)
		_, err := r.CloseLineage(t.Context(), FenceOptions{Failover: "f"})
		require.NoError(t, err)
		g.wantPoint(r, 3, at3)
	})
}

// TestNoRoleHasMore says what a stolen identity cannot do, whatever its program was made to try.
func TestNoRoleHasMore(t *testing.T) {
	journal, staging, replica := testLineage.JournalContainer(), testLineage.StagingContainer(), testLineage.ReplicaContainer()
	disk, ckpt := DiskBlobName("disk-a", 1), checkpointName(4)
	all := Roles()
	without := func(roles ...Role) []Role {
		return slices.DeleteFunc(slices.Clone(all), func(r Role) bool { return slices.Contains(roles, r) })
	}
	for _, tt := range []struct {
		what            string
		action          blobstore.Action
		container, blob string
		denied          []Role
	}{
		{"delete a manifest", blobstore.Delete, journal, manifestName(1), without(RoleRetain)},
		{"overwrite a manifest", blobstore.Write, journal, manifestName(1), all},
		{"overwrite a segment", blobstore.Write, journal, "seg/x", all},
		{"delete a staged segment", blobstore.Delete, staging, "seg/x", without(RoleRetain)},
		{"create a manifest", blobstore.Create, journal, manifestName(9), []Role{RoleApply, RoleRetain, RoleRecover}},
		{"create a segment", blobstore.Create, journal, "seg/x", without(RoleShip, RoleFailover, RoleTakeOver)},
		{"write pages of a replica disk", blobstore.Write, replica, disk, without(RoleApply)},
		{"delete a replica disk or its snapshots", blobstore.Delete, replica, disk, without(RoleApply, RoleRetain)},
		{"overwrite a checkpoint", blobstore.Write, replica, ckpt, without(RoleApply)},
		{"delete a checkpoint", blobstore.Delete, replica, ckpt, without(RoleRetain)},
		{"change the retention record", blobstore.Write, replica, retentionName, []Role{RoleShip, RoleRecover, RoleTakeOver}},
		{"write to the catalogue", blobstore.Write, CatalogueContainer, "policies/p.json", without(RoleSchedule)},
		{"write plans", blobstore.Write, CatalogueContainer, "plans/p.json", without(RoleSchedule, RoleFailover)},
		{"make containers", blobstore.MakeContainers, journal, "", without(RoleSchedule)},
	} {
		for _, role := range all {
			allowed := Rights(role).Allow(tt.action, tt.container, tt.blob)
			require.Equal(t, !slices.Contains(tt.denied, role), allowed, "%s: %s", role, tt.what)
		}
	}
}
