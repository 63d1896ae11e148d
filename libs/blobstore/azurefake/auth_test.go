package azurefake_test

import (
	"context"
	"encoding/base64"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/to"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/blob"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/bloberror"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/container"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
)

// token is a credential that is always the same.
type token string

func (k token) GetToken(context.Context, policy.TokenRequestOptions) (azcore.AccessToken, error) {
	return azcore.AccessToken{Token: string(k), ExpiresOn: time.Now().Add(time.Hour)}, nil
}

func bearer(t *testing.T, s *azurefake.Server, k string) *azblob.Client {
	t.Helper()
	c, err := azblob.NewClient(s.URL(), token(k), options(t, s))
	require.NoError(t, err)
	return c
}

func TestSharedKey(t *testing.T) {
	s := start(t, azurefake.Options{})
	box(t, s, "keys")
	wrong := base64.StdEncoding.EncodeToString([]byte("wrong"))
	c, err := azblob.NewClientFromConnectionString(strings.Replace(s.ConnectionString(), s.Key, wrong, 1), options(t, s))
	require.NoError(t, err)
	_, err = c.ServiceClient().NewContainerClient("keys").GetProperties(ctx(t), nil)
	code(t, err, 403, bloberror.AuthenticationFailed)
	anonymous, err := container.NewClientWithNoCredential(s.URL()+"/keys", (*container.ClientOptions)(options(t, s)))
	require.NoError(t, err)
	_, err = anonymous.GetProperties(ctx(t), nil)
	code(t, err, 401, bloberror.NoAuthenticationInformation)

	closed := start(t, azurefake.Options{NoSharedKey: true})
	_, err = client(t, closed).ServiceClient().GetProperties(ctx(t), nil)
	code(t, err, 403, "KeyBasedAuthenticationNotPermitted")
}

// Headers whose order differs between a sort by weights and a sort by bytes are signed by the SDK in its way.
func TestSharedKeySignsMetadata(t *testing.T) {
	s := start(t, azurefake.Options{})
	c := box(t, s, "metadata")
	p := c.NewPageBlobClient("x y/ü+%")
	_, err := p.Create(ctx(t), 512, nil)
	require.NoError(t, err)
	_, err = p.SetMetadata(ctx(t), map[string]*string{"lf_vm": to.Ptr("1"), "lfvm": to.Ptr("2"), "lf0": to.Ptr("3"), "l": to.Ptr("4")}, nil)
	require.NoError(t, err)
	got, err := p.GetProperties(ctx(t), nil)
	require.NoError(t, err)
	require.Equal(t, "1", *got.Metadata["Lf_vm"])
}

func TestClockSkew(t *testing.T) {
	for _, off := range []time.Duration{-16 * time.Minute, 16 * time.Minute} {
		clk := newClock()
		s := start(t, azurefake.Options{Now: clk.now})
		c := box(t, s, "skew")
		clk.add(off)
		_, err := c.GetProperties(ctx(t), nil)
		code(t, err, 403, bloberror.AuthenticationFailed)
		clk.add(-off / 4)
		_, err = c.GetProperties(ctx(t), nil)
		require.NoError(t, err)
	}
}

func TestServiceSAS(t *testing.T) {
	clk := newClock()
	s := start(t, azurefake.Options{Now: clk.now})
	c := box(t, s, "sas")
	require.NoError(t, put(t, c, "old", []byte("1"), true))
	key, err := azblob.NewSharedKeyCredential(s.Account, s.Key)
	require.NoError(t, err)
	with := func(v sas.BlobSignatureValues) *container.Client {
		v.ContainerName = "sas"
		if v.ExpiryTime.IsZero() {
			v.ExpiryTime = clk.now().Add(time.Hour)
		}
		q, err := v.SignWithSharedKey(key)
		require.NoError(t, err)
		cc, err := container.NewClientWithNoCredential(s.URL()+"/sas?"+q.Encode(), (*container.ClientOptions)(options(t, s)))
		require.NoError(t, err)
		return cc
	}
	create := with(sas.BlobSignatureValues{Permissions: "c"})
	require.NoError(t, put(t, create, "new", []byte("2"), true))
	code(t, put(t, create, "new", []byte("2"), true), 403, bloberror.UnauthorizedBlobOverwrite)
	_, err = get(t, create, "old", nil)
	code(t, err, 403, bloberror.AuthorizationPermissionMismatch)
	_, err = create.NewBlockBlobClient("staged").StageBlock(ctx(t), "MDE=", body([]byte("1")), nil)
	code(t, err, 403, bloberror.AuthorizationPermissionMismatch)
	read := with(sas.BlobSignatureValues{Permissions: "rl"})
	_, err = get(t, read, "old", nil)
	require.NoError(t, err)
	_, err = read.NewListBlobsFlatPager(nil).NextPage(ctx(t))
	require.NoError(t, err)
	_, err = read.NewBlobClient("old").Delete(ctx(t), nil)
	code(t, err, 403, bloberror.AuthorizationPermissionMismatch)
	_, err = read.GetProperties(ctx(t), nil)
	code(t, err, 403, bloberror.AuthorizationResourceTypeMismatch)
	require.NoError(t, put(t, with(sas.BlobSignatureValues{Permissions: "w"}), "old", []byte("3"), false))

	one := with(sas.BlobSignatureValues{Permissions: "r", BlobName: "old"})
	_, err = get(t, one, "old", nil)
	require.NoError(t, err)
	_, err = get(t, one, "new", nil)
	code(t, err, 403, bloberror.AuthenticationFailed)

	_, err = get(t, with(sas.BlobSignatureValues{Permissions: "r", StartTime: clk.now().Add(time.Minute)}), "old", nil)
	code(t, err, 403, bloberror.AuthenticationFailed)
	clk.add(time.Hour)
	_, err = get(t, read, "old", nil)
	code(t, err, 403, bloberror.AuthenticationFailed)
	_, err = get(t, with(sas.BlobSignatureValues{Permissions: "r", Protocol: sas.ProtocolHTTPS}), "old", nil)
	code(t, err, 403, bloberror.AuthorizationProtocolMismatch)
}

func TestAccountSAS(t *testing.T) {
	s := start(t, azurefake.Options{})
	key, err := azblob.NewSharedKeyCredential(s.Account, s.Key)
	require.NoError(t, err)
	with := func(permissions, types string) *service.Client {
		q, err := sas.AccountSignatureValues{Permissions: permissions, ResourceTypes: types, ExpiryTime: time.Now().Add(time.Hour)}.SignWithSharedKey(key)
		require.NoError(t, err)
		c, err := service.NewClientWithNoCredential(s.URL()+"?"+q.Encode(), (*service.ClientOptions)(options(t, s)))
		require.NoError(t, err)
		return c
	}
	all := with("rwdlac", "sco")
	_, err = all.CreateContainer(ctx(t), "acc", nil)
	require.NoError(t, err)
	require.NoError(t, put(t, all.NewContainerClient("acc"), "b", []byte("1"), false))
	_, err = all.NewListContainersPager(nil).NextPage(ctx(t))
	require.NoError(t, err)
	objects := with("rwdlac", "o")
	require.NoError(t, put(t, objects.NewContainerClient("acc"), "c", []byte("1"), false))
	_, err = objects.CreateContainer(ctx(t), "acd", nil)
	code(t, err, 403, bloberror.AuthorizationResourceTypeMismatch)
	_, err = with("r", "sco").CreateContainer(ctx(t), "acd", nil)
	code(t, err, 403, bloberror.AuthorizationPermissionMismatch)
}

func TestUserDelegationSAS(t *testing.T) {
	s := start(t, azurefake.Options{TLS: true, NoSharedKey: true, Principals: map[string]azurefake.Grants{"boss": {{Actions: azurefake.AllActions}}}})
	// The SDK takes the account's name from the host, so this needs the account's own host name: with the account in the path
	// it signs for an account "127".
	h := s.Client()
	defer h.CloseIdleConnections()
	h.Transport.(*http.Transport).DialContext = dialTo(s.Addr())
	o := options(t, s)
	o.Transport = h
	endpoint := "https://" + s.Account + ".blob.core.windows.net"
	boss, err := azblob.NewClient(endpoint, token("boss"), o)
	require.NoError(t, err)
	svc := boss.ServiceClient()
	_, err = svc.CreateContainer(ctx(t), "del", nil)
	require.NoError(t, err)
	now := time.Now().UTC()
	cred, err := svc.GetUserDelegationCredential(ctx(t), service.KeyInfo{Start: to.Ptr(now.Add(-time.Minute).Format(sas.TimeFormat)), Expiry: to.Ptr(now.Add(time.Hour).Format(sas.TimeFormat))}, nil)
	require.NoError(t, err)
	q, err := sas.BlobSignatureValues{ContainerName: "del", Permissions: "rc", ExpiryTime: now.Add(time.Hour)}.SignWithUserDelegation(cred)
	require.NoError(t, err)
	c, err := container.NewClientWithNoCredential(endpoint+"/del?"+q.Encode(), (*container.ClientOptions)(o))
	require.NoError(t, err)
	require.NoError(t, put(t, c, "b", []byte("1"), true))
	_, err = get(t, c, "b", nil)
	require.NoError(t, err)
	_, err = c.NewBlobClient("b").Delete(ctx(t), nil)
	code(t, err, 403, bloberror.AuthorizationPermissionMismatch)
}

func TestRoles(t *testing.T) {
	s := start(t, azurefake.Options{TLS: true, Principals: map[string]azurefake.Grants{
		"admin": {{Actions: azurefake.AllActions}},
		"ship":  {{Container: "lfj-", Actions: azurefake.Read | azurefake.List | azurefake.Create}, {Container: "lfr-", Actions: azurefake.Read | azurefake.List}},
		"log":   {{Container: "lfj-", Blob: "log/", Actions: azurefake.Read | azurefake.List | azurefake.Create}},
	}})
	admin, ship, log := bearer(t, s, "admin"), bearer(t, s, "ship"), bearer(t, s, "log")
	in := func(c *azblob.Client, name string) *container.Client {
		return c.ServiceClient().NewContainerClient(name)
	}
	for _, n := range []string{"lfj-1", "lfr-1"} {
		_, err := admin.CreateContainer(ctx(t), n, nil)
		require.NoError(t, err)
	}
	mismatch := func(err error) { t.Helper(); code(t, err, 403, bloberror.AuthorizationPermissionMismatch) }
	require.NoError(t, put(t, in(ship, "lfj-1"), "data/1", []byte("1"), true))
	code(t, put(t, in(ship, "lfj-1"), "data/1", []byte("1"), true), 403, bloberror.UnauthorizedBlobOverwrite)
	code(t, put(t, in(ship, "lfj-1"), "data/1", []byte("1"), false), 403, bloberror.UnauthorizedBlobOverwrite)
	mismatch(put(t, in(ship, "lfr-1"), "x", []byte("1"), true))
	_, err := ship.DeleteBlob(ctx(t), "lfj-1", "data/1", nil)
	mismatch(err)
	_, err = ship.CreateContainer(ctx(t), "lfj-2", nil)
	mismatch(err)
	p := pageBlob(t, in(ship, "lfj-1"), "pages", 512)
	mismatch(write(t, p, 0, fill(512, 1), nil))
	require.NoError(t, write(t, in(admin, "lfj-1").NewPageBlobClient("pages"), 0, fill(512, 1), nil))
	require.NoError(t, put(t, in(log, "lfj-1"), "log/1", []byte("1"), true))
	mismatch(put(t, in(log, "lfj-1"), "data/2", []byte("1"), true))
	_, err = get(t, in(log, "lfj-1"), "data/1", nil)
	mismatch(err)
	list := func(prefix string) error {
		_, err := in(log, "lfj-1").NewListBlobsFlatPager(&container.ListBlobsFlatOptions{Prefix: &prefix}).NextPage(ctx(t))
		return err
	}
	require.NoError(t, list("log/"))
	mismatch(list(""))

	_, err = get(t, in(bearer(t, s, "nobody"), "lfj-1"), "data/1", nil)
	code(t, err, 401, bloberror.InvalidAuthenticationInfo)
	s.SetGrants("ship", nil)
	_, err = get(t, in(ship, "lfj-1"), "data/1", nil)
	code(t, err, 401, bloberror.InvalidAuthenticationInfo)
	s.SetGrants("ship", azurefake.Grants{{Actions: azurefake.Read}})
	_, err = get(t, in(ship, "lfj-1"), "data/1", nil)
	require.NoError(t, err)
}

// A client that dials here for the account's own host name needs no account in the path.
func TestHostStyle(t *testing.T) {
	s := start(t, azurefake.Options{TLS: true})
	h := s.Client()
	defer h.CloseIdleConnections()
	h.Transport.(*http.Transport).DialContext = dialTo(s.Addr())
	o := options(t, s)
	o.Transport = h
	key, err := azblob.NewSharedKeyCredential(s.Account, s.Key)
	require.NoError(t, err)
	c, err := azblob.NewClientWithSharedKeyCredential("https://"+s.Account+".blob.core.windows.net", key, o)
	require.NoError(t, err)
	_, err = c.CreateContainer(ctx(t), "host", nil)
	require.NoError(t, err)
	_, err = c.UploadBuffer(ctx(t), "host", "b", []byte("1"), nil)
	require.NoError(t, err)
}

func TestLeases(t *testing.T) {
	clk := newClock()
	s := start(t, azurefake.Options{Now: clk.now, MaxSkew: -1})
	c := box(t, s, "leases")
	p := pageBlob(t, c, "disk", mib)
	const a, b = "11111111-1111-4111-8111-111111111111", "22222222-2222-4222-8222-222222222222"
	act := func(action, id, proposed string, n int) error {
		return leaseCall(t, s, c.URL()+"/disk", action, id, proposed, n)
	}
	data := fill(512, 1)
	with := func(id string) error {
		o := leasedBy(id)
		return write(t, p, 0, data, o)
	}
	code(t, act("renew", a, "", 0), 409, bloberror.LeaseNotPresentWithLeaseOperation)
	code(t, act("break", "", "", -1), 409, bloberror.LeaseNotPresentWithLeaseOperation)
	code(t, with(a), 412, bloberror.LeaseNotPresentWithBlobOperation)
	code(t, act("acquire", "", a, 14), 400, bloberror.InvalidHeaderValue)
	require.NoError(t, act("acquire", "", a, 15))
	require.NoError(t, act("acquire", "", a, 60), "again with its own id")
	code(t, act("acquire", "", b, 60), 409, bloberror.LeaseAlreadyPresent)
	code(t, with(""), 412, bloberror.LeaseIDMissing)
	code(t, with(b), 412, bloberror.LeaseIDMismatchWithBlobOperation)
	require.NoError(t, with(a))
	code(t, act("renew", b, "", 0), 409, bloberror.LeaseIDMismatchWithLeaseOperation)
	clk.add(50 * time.Second)
	require.NoError(t, act("renew", a, "", 0))
	clk.add(59 * time.Second)
	require.NoError(t, with(a))
	clk.add(2 * time.Second)
	code(t, with(a), 412, bloberror.LeaseLost)
	require.NoError(t, act("renew", a, "", 0), "nobody came between")
	clk.add(61 * time.Second)
	require.NoError(t, with(""), "an expired lease hinders nobody")
	code(t, act("renew", a, "", 0), 409, bloberror.LeaseNotPresentWithLeaseOperation)
	require.NoError(t, act("acquire", "", a, -1))
	clk.add(24 * time.Hour)
	require.NoError(t, with(a), "an infinite lease")
	require.NoError(t, act("change", a, b, 0))
	code(t, with(a), 412, bloberror.LeaseIDMismatchWithBlobOperation)
	require.NoError(t, act("break", "", "", 10))
	code(t, act("acquire", "", a, 15), 409, bloberror.LeaseAlreadyPresent)
	code(t, act("acquire", "", b, 15), 409, bloberror.LeaseIsBreakingAndCannotBeAcquired)
	code(t, act("change", b, a, 0), 409, bloberror.LeaseIsBreakingAndCannotBeChanged)
	require.NoError(t, with(b), "until it is broken")
	clk.add(11 * time.Second)
	code(t, with(b), 412, bloberror.LeaseLost)
	code(t, act("renew", b, "", 0), 409, bloberror.LeaseIsBrokenAndCannotBeRenewed)
	require.NoError(t, act("acquire", "", a, 15))
	require.NoError(t, act("break", "", "", 0))
	require.NoError(t, act("acquire", "", b, 15))
	_, err := p.CreateSnapshot(ctx(t), nil)
	require.NoError(t, err, "a snapshot needs no lease id")
	_, err = p.Delete(ctx(t), &blob.DeleteOptions{DeleteSnapshots: to.Ptr(blob.DeleteSnapshotsOptionTypeInclude)})
	code(t, err, 412, bloberror.LeaseIDMissing)
	require.NoError(t, act("release", b, "", 0))
	_, err = p.Delete(ctx(t), &blob.DeleteOptions{DeleteSnapshots: to.Ptr(blob.DeleteSnapshotsOptionTypeInclude)})
	require.NoError(t, err)

	require.NoError(t, leaseCall(t, s, c.URL(), "acquire", "", a, -1))
	_, err = c.Delete(ctx(t), nil)
	code(t, err, 412, bloberror.LeaseIDMissing)
}
