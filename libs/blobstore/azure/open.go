package azure

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/Azure/azure-sdk-for-go/sdk/azcore"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/cloud"
	"github.com/Azure/azure-sdk-for-go/sdk/azcore/policy"
	"github.com/Azure/azure-sdk-for-go/sdk/azidentity"
	"github.com/Azure/azure-sdk-for-go/sdk/storage/azblob/service"

	"github.com/landfall-dr/landfall/libs/blobstore"
	"github.com/landfall-dr/landfall/libs/blobstore/azure/internal/pace"
)

// Doer sends one HTTP request; an *http.Client is one.
type Doer interface {
	Do(*http.Request) (*http.Response, error)
}

// Immutability reads and sets write-once policies through the management plane.
type Immutability interface {
	// ContainerPolicy reads a container's policy: ErrNoContainer when there is none such.
	ContainerPolicy(ctx context.Context, account, container string) (blobstore.Protection, error)
	// ProtectContainer sets a policy of at least this strength.
	ProtectContainer(ctx context.Context, account, container string, p blobstore.Protection) error
}

// Request is one try of a call, for metrics and tests.
type Request struct {
	Op      string // such as "write pages"
	Blob    string // container/name, or the container, or ""
	Bytes   int64
	Try     int // from 0
	Took    time.Duration
	Err     error // translated; nil is success
	Lost    bool  // no answer that says whether it was done
	Limited bool  // the service asked for less
}

// Options tune a Store. The zero value is right for production.
type Options struct {
	// Wrap wraps the HTTP client, for tests that break the network.
	Wrap func(Doer) Doer
	// OnRequest is called after every try, concurrently; it must not block.
	OnRequest func(Request)
	// Immutability is asked by ContainerProtection and ProtectContainer; nil says less and refuses.
	Immutability Immutability
	// Credential is used instead of Settings' for tests; requests then need https.
	Credential azcore.TokenCredential
	// Clock is this machine's clock, whose distance to storage time is reported; nil is time.Now.
	Clock func() time.Time
	// Backoff is the first delay between tries, doubled each time up to 30 s; 0 is 500 ms.
	Backoff time.Duration
}

// Store is a blobstore.Store in a storage account. It is safe for concurrent use.
type Store struct {
	settings Settings
	opts     Options
	account  string
	client   *service.Client
	http     *http.Transport
	pacer    *pace.Pacer
	clock    clock
	infos    infoCache
	checksum atomic.Int32 // of type summing: what uploads carry
	versions atomic.Bool  // an answer named a version
	closed   atomic.Bool
	buffers  sync.Pool // of *[]byte with pieceSize bytes
	single   int64     // largest blob that is put in one request, in bytes
}

var (
	_ blobstore.Store       = (*Store)(nil)
	_ blobstore.RequestCost = (*Store)(nil)
	_ blobstore.Protector   = (*Store)(nil)
)

// Open returns the store in the account at this address (see [Settings.ValidateURL]). It checks the settings and reads
// certificates; it does not ask the account anything.
func Open(account string, settings Settings, opts Options) (*Store, error) {
	if err := settings.Validate(); err != nil {
		return nil, fmt.Errorf("open storage account: %w", err)
	}
	settings = settings.withDefaults()
	if opts.Credential != nil {
		settings.Credential = ManagedIdentity
	}
	conn, err := settings.endpoint(account)
	if err != nil {
		return nil, fmt.Errorf("open storage account: %w", err)
	}
	if opts.Clock == nil {
		opts.Clock = time.Now
	}
	if opts.Backoff <= 0 {
		opts.Backoff = 500 * time.Millisecond
	}
	limits := pace.Limits{Account: settings.Concurrency, Blob: settings.BlobConcurrency}
	if settings.PageRequests > 0 {
		limits.Requests = float64(settings.PageRequests)
	}
	if settings.PageBandwidth > 1 {
		limits.Bytes = int64(settings.PageBandwidth)
	}
	s := &Store{settings: settings, opts: opts, account: accountName(conn.url), pacer: pace.New(limits), single: maxSinglePut}
	s.buffers.New = func() any { b := make([]byte, pieceSize); return &b }
	s.checksum.Store(int32(firstSumming(settings.Checksum)))
	if s.http, err = newTransport(settings); err != nil {
		return nil, fmt.Errorf("open storage account: %w", err)
	}
	var do Doer = &http.Client{Transport: s.http, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	if opts.Wrap != nil {
		do = opts.Wrap(do)
	}
	if err := s.connect(conn, do); err != nil {
		s.http.CloseIdleConnections()
		return nil, fmt.Errorf("open storage account: %w", err)
	}
	return s, nil
}

// accountName is the first label of the host, or the first folder of an emulator's address.
func accountName(address string) string {
	u, err := url.Parse(address)
	if err != nil {
		return ""
	}
	if p := strings.Trim(u.Path, "/"); p != "" {
		return p
	}
	name, _, _ := strings.Cut(u.Host, ".")
	return name
}

// newTransport is shared by all calls, and by the requests for tokens.
func newTransport(s Settings) (*http.Transport, error) {
	t := &http.Transport{
		Proxy:       http.ProxyFromEnvironment,
		DialContext: (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		// Every request in flight can keep its connection. There is no cap below that: the pacer is one.
		MaxIdleConns: s.Concurrency + 8, MaxIdleConnsPerHost: s.Concurrency + 4, IdleConnTimeout: 90 * time.Second,
		TLSHandshakeTimeout: 10 * time.Second, ExpectContinueTimeout: time.Second,
		TLSClientConfig: &tls.Config{MinVersion: tls.VersionTLS12},
		// Blob endpoints gain nothing from HTTP/2, where one connection's window would bind all requests.
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{}, DisableCompression: true,
		WriteBufferSize: 64 << 10, ReadBufferSize: 64 << 10,
	}
	switch s.Proxy {
	case "":
	case "none":
		t.Proxy = nil
	default:
		u, err := url.Parse(s.Proxy)
		if err != nil {
			return nil, fmt.Errorf("proxy: %w", err)
		}
		t.Proxy = http.ProxyURL(u)
	}
	if s.CAFile != "" {
		pem, err := os.ReadFile(s.CAFile)
		if err != nil {
			return nil, fmt.Errorf("ca_file: %w", err)
		}
		pool, err := x509.SystemCertPool()
		if err != nil {
			pool = x509.NewCertPool()
		}
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%w: ca_file %s holds no certificate", blobstore.ErrInvalid, s.CAFile)
		}
		t.TLSClientConfig.RootCAs = pool
	}
	return t, nil
}

// connect makes the SDK's client.
func (s *Store) connect(conn connection, do Doer) error {
	renewed := &renewal{settings: s.settings, conn: conn}
	opts := service.ClientOptions{ClientOptions: azcore.ClientOptions{
		Transport: do, Retry: policy.RetryOptions{MaxRetries: -1},
		Telemetry:       policy.TelemetryOptions{ApplicationID: "landfall"},
		PerCallPolicies: []policy.Policy{&s.clock, wantSum{}, renewed},
	}}
	var err error
	switch {
	case conn.key != "":
		var key *service.SharedKeyCredential
		if key, err = service.NewSharedKeyCredential(conn.account, conn.key); err != nil {
			return fmt.Errorf("%w: the account key is no base64", blobstore.ErrCredentials)
		}
		renewed.key = key
		s.client, err = service.NewClientWithSharedKeyCredential(conn.url, key, &opts)
	case conn.sas != "":
		renewed.sas.Store(&conn.sas)
		s.client, err = service.NewClientWithNoCredential(conn.url, &opts)
	default:
		cred := s.opts.Credential
		if cred == nil {
			if cred, err = tokens(s.settings, do); err != nil {
				return err
			}
		}
		s.client, err = service.NewClient(conn.url, cred, &opts)
	}
	return err
}

// tokens makes the credential of an identity. Its requests go the way of all others: proxy, CA.
func tokens(s Settings, do Doer) (azcore.TokenCredential, error) {
	o := azcore.ClientOptions{Transport: do, Retry: policy.RetryOptions{MaxRetries: 2, RetryDelay: 500 * time.Millisecond, TryTimeout: 20 * time.Second}}
	if s.Authority != "" {
		o.Cloud = cloud.Configuration{ActiveDirectoryAuthorityHost: s.Authority}
	}
	switch s.Kind() {
	case WorkloadIdentity:
		return azidentity.NewWorkloadIdentityCredential(&azidentity.WorkloadIdentityCredentialOptions{
			ClientOptions: o, ClientID: s.Client, TenantID: s.Tenant, TokenFilePath: s.TokenFile,
		})
	case ManagedIdentity:
		mi := &azidentity.ManagedIdentityCredentialOptions{ClientOptions: o}
		if s.Client != "" {
			mi.ID = azidentity.ClientID(s.Client)
		}
		return azidentity.NewManagedIdentityCredential(mi)
	case ClientCertificate:
		raw, err := os.ReadFile(s.Certificate)
		if err != nil {
			return nil, fmt.Errorf("certificate: %w", err)
		}
		certs, key, err := azidentity.ParseCertificates(raw, []byte(s.CertificatePassword.Reveal()))
		if err != nil {
			return nil, fmt.Errorf("%w: certificate %s cannot be read: %w", blobstore.ErrCredentials, s.Certificate, err)
		}
		return azidentity.NewClientCertificateCredential(s.Tenant, s.Client, certs, key, &azidentity.ClientCertificateCredentialOptions{ClientOptions: o})
	}
	return nil, fmt.Errorf("%w: no credential", blobstore.ErrCredentials)
}

// Account is the account's name.
func (s *Store) Account() string { return s.account }

// Close lets go of idle connections. Calls in flight end by their contexts.
func (s *Store) Close() error {
	s.closed.Store(true)
	s.http.CloseIdleConnections()
	return nil
}
