package storagecheck

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/replica"
	"github.com/landfall-dr/landfall/libs/segment"
)

// token is an identity whose only secret is its name.
type token string

func (k token) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: string(k), ExpiresOn: time.Now().Add(time.Hour)}, nil
}

// grants are ours in the words of the service's roles.
func grants(role replica.Role) (out azurefake.Grants) {
	words := map[blobstore.Action]azurefake.Action{
		blobstore.Read: azurefake.Read | azurefake.List, blobstore.Create: azurefake.Create, blobstore.Write: azurefake.Write,
		blobstore.Delete: azurefake.Delete, blobstore.MakeContainers: azurefake.ContainerWrite, blobstore.ListContainers: azurefake.ContainerRead,
	}
	for _, g := range replica.Rights(role) {
		one := azurefake.Grant{Container: g.Containers, Blob: g.Blobs}
		for ours, theirs := range words {
			if g.Actions&ours != 0 {
				one.Actions |= theirs
			}
		}
		out = append(out, one)
	}
	return out
}

// account is a strict service where each role has a token with its own rights and there are no keys.
func account(t *testing.T, o azurefake.Options) (as func(replica.Role) blobstore.Store, server *azurefake.Server) {
	o.TLS, o.NoSharedKey, o.Principals = true, true, map[string]azurefake.Grants{}
	for _, role := range replica.Roles() {
		o.Principals[string(role)] = grants(role)
	}
	server = azurefake.New(o)
	server.Start(t)
	ca := filepath.Join(t.TempDir(), "ca.pem")
	require.NoError(t, os.WriteFile(ca, server.CertificatePEM(), 0o600))
	return func(role replica.Role) blobstore.Store {
		s, err := azure.Open(server.URL(), azure.Settings{CAFile: ca, RetryFor: 5 * time.Second}, azure.Options{Credential: token(role)})
		require.NoError(t, err)
		t.Cleanup(func() { _ = s.Close() })
		return s
	}, server
}

// TestRolesOfAnAccount: what validate says of roles that are set up as the page for operators wants them.
func TestRolesOfAnAccount(t *testing.T) {
	as, _ := account(t, azurefake.Options{})
	for _, role := range append([]replica.Role{replica.RoleSchedule}, replica.Roles()...) {
		r, err := Run(t.Context(), as(role), options(role))
		require.NoError(t, err, role)
		require.Empty(t, only(r, Fail), role)
		for _, c := range only(r, Warn) {
			require.Contains(t, []string{"account settings", "write-once journal"}, c.Name, "%s: %s", role, c.Found) // no role may ask for them; there is none
		}
	}
}

const (
	lineage  replica.Lineage = "0123456789abcdef0123456789abcdef"
	diskSize                 = 4 << 20
)

// TestRolesAtWork takes a lineage through its life on a strict service, each role with its own token.
func TestRolesAtWork(t *testing.T) {
	ctx := t.Context()
	as, _ := account(t, azurefake.Options{})
	open := func(role replica.Role) *replica.Replica {
		r, err := replica.Open(ctx, as(role), lineage)
		require.NoError(t, err, role)
		return r
	}
	_, err := replica.Create(ctx, as(replica.RoleSchedule), lineage)
	require.NoError(t, err)

	ship := open(replica.RoleShip)
	point := func(kind replica.Kind, ordinal, base replica.Ordinal, fill byte) {
		h := segment.Header{Lineage: lineage.Bytes(), DiskID: "os", Gen: 1, DiskSize: diskSize, Kind: segment.KindPoint, Ordinal: uint64(ordinal)}
		w, err := segment.NewWriter(h, nil, segment.Options{Compression: segment.Fast})
		require.NoError(t, err)
		require.NoError(t, w.Data(int64(ordinal)<<16, bytes.Repeat([]byte{fill}, 64<<10)))
		body, sha, _, err := w.Finish()
		require.NoError(t, err)
		seg, err := ship.PutSegment(ctx, replica.SegmentKey{Kind: kind, Ordinal: ordinal, Tx: replica.NewTx(), DiskID: "os"}, body, sha)
		require.NoError(t, err)
		_, err = ship.Commit(ctx, replica.Proposal{
			Kind: kind, Epoch: 1, Point: ordinal, Base: base, CutTime: time.Now(), Consistency: replica.ConsistencyCrash,
			Disks: []replica.Disk{{ID: "os", Gen: 1, Size: diskSize, Segments: []replica.Segment{seg}}},
		})
		require.NoError(t, err)
	}
	point(replica.KindBase, 1, 0, 'a')
	point(replica.KindPoint, 2, 1, 'b')
	point(replica.KindPoint, 3, 2, 'c')

	applier, err := replica.NewApplier(open(replica.RoleApply), replica.ApplierOptions{Footer: func(string, int64) []byte { return make([]byte, 512) }})
	require.NoError(t, err)
	_, err = applier.Advance(ctx, 3)
	require.NoError(t, err)
	_, err = open(replica.RoleApply).Checkpoint(ctx, 3)
	require.NoError(t, err)

	pin := replica.Pin{Seq: 3, Owner: "hold/case-7"}
	require.NoError(t, open(replica.RoleSchedule).Pin(ctx, pin))
	res, err := open(replica.RoleRetain).Retain(ctx, replica.RetainOptions{
		Keep: replica.Keep{All: time.Hour, Hourly: time.Hour, Limit: time.Hour}, Now: time.Now().Add(48 * time.Hour), OrphanAge: -1,
	})
	require.NoError(t, err)
	t.Logf("retention: %+v", res)
	require.NoError(t, open(replica.RoleSchedule).Unpin(ctx, pin.Owner, 0))

	point(replica.KindPoint, 4, 3, 'd')
	failover := open(replica.RoleFailover)
	_, err = failover.CloseLineage(ctx, replica.FenceOptions{Failover: "f"})
	require.NoError(t, err)
	_, err = failover.Rewind(ctx, replica.RewindOptions{Failover: "f", Target: 3})
	require.NoError(t, err)

	source, err := open(replica.RoleRecover).SourceAt(ctx, 4, "os")
	require.NoError(t, err)
	got := make([]byte, 4)
	require.NoError(t, source.ReadAt(ctx, got, 4<<16))
	require.Equal(t, "dddd", string(got))
	_, err = open(replica.RoleTakeOver).CloseLineage(ctx, replica.FenceOptions{Failover: "f"})
	require.NoError(t, err)

	_, err = open(replica.RoleApply).CloseLineage(ctx, replica.FenceOptions{Failover: "g"})
	require.Error(t, err)
	for _, role := range replica.Roles() {
		if role != replica.RoleRetain {
			err := as(role).Container(lineage.JournalContainer()).Delete(ctx, "log/000000000004.json", blobstore.Conditions{})
			require.ErrorIs(t, err, blobstore.ErrPermission, role)
		}
	}
}
