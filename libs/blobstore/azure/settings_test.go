package azure

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/sas"
	"github.com/stretchr/testify/require"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azurefake"
	"github.com/landfall-dr/landfall/libs/config"
)

func signedSAS(t *testing.T, s *Store, perms string) string {
	t.Helper()
	p := sas.AccountPermissions{
		Read: strings.Contains(perms, "r"), List: strings.Contains(perms, "l"), Create: strings.Contains(perms, "c"),
		Write: strings.Contains(perms, "w"), Delete: strings.Contains(perms, "d"),
	}
	u, err := s.client.GetSASURL(sas.AccountResourceTypes{Object: true, Container: strings.Contains(perms, "l")}, p, time.Now().Add(time.Hour), nil)
	require.NoError(t, err)
	_, q, _ := strings.Cut(u, "?")
	return q
}

func TestValidate(t *testing.T) {
	require.NoError(t, Settings{}.Validate(), "another backend is in use")
	require.NoError(t, DefaultSettings().Validate())
	missing := filepath.Join(t.TempDir(), "none")
	err := Settings{
		Credential: ClientCertificate, Certificate: missing, CAFile: missing, Proxy: "nowhere", Authority: "http://x", Concurrency: 5000,
		BlobConcurrency: -1, PageRequests: 3, PageBandwidth: 5, MinRate: 5, Checksum: "sha", RetryFor: 2 * time.Hour, TryTimeout: time.Millisecond,
		SAS: config.NewSecret("sv=1"), ConnectionString: config.NewSecret("nonsense"),
	}.Validate()
	for _, key := range []string{
		"tenant", "client", "certificate", "ca_file", "proxy", "authority", "concurrency", "blob_concurrency", "page_requests",
		"page_bandwidth", "min_rate", "checksum", "retry_for", "try_timeout", "sas", "connection_string",
	} {
		require.ErrorContains(t, err, key+": ")
	}
	require.ErrorContains(t, Settings{Credential: "password"}.Validate(), "is not one of")
	t.Setenv("AZURE_FEDERATED_TOKEN_FILE", "")
	require.ErrorContains(t, Settings{Credential: WorkloadIdentity}.Validate(), "token_file: must be set")
}

func TestValidateURL(t *testing.T) {
	key := Settings{ConnectionString: config.NewSecret("AccountName=acct;AccountKey=a2V5")}
	for _, tc := range []struct {
		url, problem string
		s            Settings
	}{
		{url: "https://acct.blob.core.windows.net", s: key},
		{url: "https://acct.blob.core.windows.net/", s: key},
		{url: "", s: key},
		{url: "https://other.blob.core.windows.net", s: key, problem: "is not the account"},
		{url: "", s: Settings{Credential: ManagedIdentity}, problem: "must be set"},
		{url: "https://acct.blob.core.windows.net", problem: "azure.credential"},
		{url: "https://acct.blob.core.windows.net", s: Settings{Credential: ManagedIdentity}},
		{url: "http://acct.example", s: Settings{Credential: ManagedIdentity}, problem: "over plain http"},
		{url: "http://acct.example", s: Settings{Credential: WorkloadIdentity}, problem: "over plain http"},
		{url: "http://127.0.0.1:1/acct", s: Settings{SAS: config.NewSecret("sig=x")}},
		{url: "http://emulator:10000/acct", s: Settings{SAS: config.NewSecret("sig=x")}, problem: "over plain http can be used"},
		{s: Settings{ConnectionString: config.NewSecret("BlobEndpoint=http://emulator/acct;SharedAccessSignature=sig=x")}, problem: "over plain http can be used"},
		{s: Settings{ConnectionString: config.NewSecret("BlobEndpoint=http://emulator/acct;AccountName=acct;AccountKey=a2V5")}},
		{url: "https://acct.blob.core.windows.net/container/blob", s: key, problem: "more than an account"},
		{url: "https://u:p@acct.blob.core.windows.net", s: key, problem: "no credentials"},
		{url: "ftp://acct", s: key, problem: "is no address"},
	} {
		err := tc.s.ValidateURL(tc.url)
		if tc.problem == "" {
			require.NoError(t, err, tc.url)
		} else {
			require.ErrorContains(t, err, tc.problem, tc.url)
		}
	}
	require.Equal(t, "acct", accountName("https://acct.blob.core.windows.net"))
	require.Equal(t, "acct", accountName("http://127.0.0.1:1/acct"))
}

func TestConnectionStrings(t *testing.T) {
	c, err := parseConnectionString("DefaultEndpointsProtocol=http;AccountName=acct;AccountKey=a2V5==;EndpointSuffix=core.chinacloudapi.cn")
	require.NoError(t, err)
	require.Equal(t, connection{url: "http://acct.blob.core.chinacloudapi.cn", account: "acct", key: "a2V5=="}, c)
	c, err = parseConnectionString("BlobEndpoint=https://acct.example/;SharedAccessSignature=sv=1&sig=x%3D")
	require.NoError(t, err)
	require.Equal(t, connection{url: "https://acct.example", sas: "sv=1&sig=x%3D"}, c)
	for _, bad := range []string{"", "AccountKey=secret", "AccountName=a", "BlobEndpoint=https://x;AccountKey=secret", "secret"} {
		_, err := parseConnectionString(bad)
		require.Error(t, err, bad)
		require.NotContains(t, err.Error(), "secret")
	}
}

// TestCertificateAndCA: an application's certificate fetches a token, a private CA is trusted, and all of it goes through the
// one client, as a refusal by the identity provider does.
func TestCertificateAndCA(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, data []byte) string {
		path := filepath.Join(dir, name)
		require.NoError(t, os.WriteFile(path, data, 0o600))
		return path
	}
	srv := fake(t, azurefake.Options{TLS: true, Principals: map[string]azurefake.Grants{"token-1": {{Actions: azurefake.AllActions}}}})
	set := Settings{
		Credential: ClientCertificate, Tenant: "11111111-1111-1111-1111-111111111111", Client: "22222222-2222-2222-2222-222222222222",
		Certificate: file("cert.pem", selfSigned(t)), CAFile: file("ca.pem", srv.CertificatePEM()), RetryFor: 200 * time.Millisecond,
	}
	var refuse atomic.Bool
	identity := func(next Doer) Doer { return &provider{next: next, refuse: &refuse} }
	s, err := Open(srv.URL(), set, Options{Wrap: identity, Backoff: time.Millisecond})
	require.NoError(t, err)
	defer s.Close()
	require.NoError(t, s.CreateContainer(t.Context(), "abc"))
	_, err = s.Container("abc").CreatePages(t.Context(), "p", 1<<20, nil, blobstore.Conditions{})
	require.NoError(t, err)
	_, err = s.Container("abc").WritePages(t.Context(), "p", 0, page(1, 8), blobstore.Conditions{})
	require.NoError(t, err)

	refuse.Store(true)
	s2, err := Open(srv.URL(), set, Options{Wrap: identity, Backoff: time.Millisecond})
	require.NoError(t, err)
	defer s2.Close()
	err = s2.CreateContainer(t.Context(), "abc")
	require.ErrorIs(t, err, blobstore.ErrCredentials)
	require.ErrorContains(t, err, "AADSTS7000215")
	require.NotContains(t, err.Error(), "assertion")

	set.CAFile = ""
	s3, err := Open(srv.URL(), set, Options{Wrap: identity, Backoff: time.Millisecond})
	require.NoError(t, err)
	defer s3.Close()
	refuse.Store(false)
	require.ErrorContains(t, s3.CreateContainer(t.Context(), "abc"), "certificate")

	set.Certificate = file("broken.pem", []byte("nothing"))
	_, err = Open(srv.URL(), set, Options{})
	require.ErrorIs(t, err, blobstore.ErrCredentials)
}

// provider answers for the identity provider.
type provider struct {
	next   Doer
	refuse *atomic.Bool
}

func (p *provider) Do(req *http.Request) (*http.Response, error) {
	if !strings.HasPrefix(req.URL.Host, "login.") {
		return p.next.Do(req)
	}
	w := httptest.NewRecorder()
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Date", time.Now().UTC().Format(http.TimeFormat))
	base := "https://login.microsoftonline.com/11111111-1111-1111-1111-111111111111"
	switch {
	case strings.Contains(req.URL.Path, "discovery"):
		_, _ = w.WriteString(`{"tenant_discovery_endpoint":"` + base + `/v2.0/.well-known/openid-configuration","api-version":"1.1",
			"metadata":[{"preferred_network":"login.microsoftonline.com","preferred_cache":"login.windows.net","aliases":["login.microsoftonline.com"]}]}`)
	case strings.Contains(req.URL.Path, "openid-configuration"):
		_, _ = w.WriteString(`{"token_endpoint":"` + base + `/oauth2/v2.0/token","authorization_endpoint":"` + base + `/a","issuer":"` + base + `/v2.0"}`)
	case p.refuse.Load():
		w.WriteHeader(401)
		_, _ = w.WriteString(`{"error":"invalid_client","error_description":"AADSTS7000215: no such certificate","error_codes":[7000215]}`)
	default:
		_, _ = w.WriteString(`{"token_type":"Bearer","expires_in":3600,"access_token":"token-1"}`)
	}
	resp := w.Result()
	resp.Request = req
	return resp, nil
}

func selfSigned(t *testing.T) []byte {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	require.NoError(t, err)
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "landfall"}, NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	require.NoError(t, err)
	pk, err := x509.MarshalPKCS8PrivateKey(key)
	require.NoError(t, err)
	return append(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pk})...)
}
